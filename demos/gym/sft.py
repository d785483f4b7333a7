# a small model's warm-up on the task's own answers, from random weights, byte by byte
data_dir = "out/gym_demo/chat"
out_dir = "out/gym_demo/sft"
num_steps = 240
batch_size = 16  # rows per step, about four questions in each
seq_len = 256
lr = 2e-3
warmup_steps = 20
log_every = 50
eval_every = 0
model = dict(n_layer=4, n_head=4, n_embd=128)
