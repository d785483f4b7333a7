# a model of 0.9 M parameters on rows of 256 bytes, to be extended to 1024
data_dir = "out/long_context/bytes"
out_dir = "out/long_context/256"
num_steps = 1000
batch_size = 16  # rows per step
seq_len = 256
lr = 3e-3
warmup_steps = 100
eval_every = 500
eval_seqs = 1024
save_every = 1000
model = dict(n_layer=4, n_head=4, n_embd=128, d_ff=384, qk_norm=True)
