raise SystemExit("error: this is extras.capacity now: python -m extras.capacity ...")
