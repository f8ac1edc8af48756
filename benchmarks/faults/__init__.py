"""Ways to make a stage fail, for tests and benchmarks: kills at a chosen moment, full disks, damaged files."""
