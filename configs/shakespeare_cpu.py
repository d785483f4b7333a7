# nanoGPT's CPU configuration (4 layers, 4 heads, 128 channels, context 64, batch 12, 2000 steps) on
# bytes
data_dir = "out/shakespeare_bytes"
out_dir = "out/shakespeare_cpu"
num_steps = 2000
batch_size = 12                        # sequences per step
seq_len = 64
lr = 3e-3
warmup_steps = 100
weight_decay = 0.1
eval_every = 500
eval_seqs = 2560
save_every = 1000
model = dict(n_layer=4, n_head=4, n_embd=128, d_ff=344)
