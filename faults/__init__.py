"""What a run survives: kills, torn writes, damage, full disks, signals, hung ranks, strange input."""
