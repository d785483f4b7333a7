raise SystemExit("error: now python extras/gym.py ..., and --reward=extras/gym.py:reward")
