"""What a fusion found out: the record, its page and its pictures."""
