"""What `soak.py` is made of: runs that can be killed, the kills, the comparison."""
