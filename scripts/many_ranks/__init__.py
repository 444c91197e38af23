"""Many ranks of the real trainer on one machine: `scripts/simulate_training_ranks.py`."""
