# a student of a third of the demo's pretrained model's size learns from it, in under a minute on two CPU cores
data_dir = "out/demo/data"
out_dir = "out/demo/kd"
teacher = "out/demo/pretrain"
kd_frac = 1.0                          # 0.0: the same student without its teacher
num_steps = 300
batch_size = 16                        # rows per step
seq_len = 128
lr = 4e-3
warmup_steps = 30
log_every = 50
eval_every = 100
save_every = 0
model = dict(n_layer=4, n_head=4, n_kv_head=2, n_embd=120)
