# after student.py: it learns from the demo's pretrained model, less than a minute on two CPU cores
out_dir = "out/demo/kd"
teacher = "out/demo/pretrain"
kd_frac = 1.0  # the teacher's distribution alone, no cross-entropy
