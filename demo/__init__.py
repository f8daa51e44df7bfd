"""The main job on real data: ``python -m demo`` trains, packs, bakes, serves, and compares the ways to serve."""
