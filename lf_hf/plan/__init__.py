"""What a run takes, by arithmetic: where everything lies, how many bytes at its peak, and how many minutes."""
