"""What Ray starts: `python -m jobs.<verb>`."""
