raise SystemExit("error: this is extras.hf now: python -m extras.hf import|export ...")
