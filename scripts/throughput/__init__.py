"""Parts of `bench_train.py`: the loops that training is compared with."""
