"""What the machine gives: the processes of a launch, free memory, numbers of any device, progress."""
