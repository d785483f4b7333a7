# a model of a third of the size of the demo's pretrained one; alone by train_pretrain.py, taught
# with kd.py
data_dir = "out/demo/data"
num_steps = 100
batch_size = 16  # rows per step
seq_len = 128
lr = 4e-3
warmup_steps = 20
log_every = 50
eval_every = 0  # at the end only
eval_seqs = 512
save_every = 0
eval_prompts = ["ROMEO.\n", "KING HENRY.\nOnce more"]
model = dict(n_layer=4, n_head=4, n_kv_head=2, n_embd=120)
