raise SystemExit("error: this is extras.plot now: python -m extras.plot RUN ...")
