# Shakespeare from scratch, about three minutes on two CPU cores
data_dir = "out/demo/data"
out_dir = "out/demo/pretrain"
num_steps = 640
batch_size = 8  # sequences per step
seq_len = 128
lr = 3e-3
warmup_steps = 60
log_every = 40
eval_every = 320
eval_seqs = 256
save_every = 320
eval_prompts = ["ROMEO.\n", "KING HENRY.\nOnce more"]
model = dict(n_layer=6, n_head=6, n_kv_head=2, n_embd=192)
