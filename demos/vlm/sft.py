# Questions about pictures, from random weights; see run.py.
data_dir = "out/vlm_demo/sees/set"
out_dir = "out/vlm_demo/sees/run"
batch_size = 4  # rows of seventeen questions or so, each with its picture
seq_len = 512
num_steps = 1500
num_epochs = 0
optimizer = "muon"
lr = 2e-3
warmup_steps = 40
weight_decay = 0.05
eval_every = 150
eval_seqs = 60
save_every = 300
log_every = 25
model = dict(n_layer=2, n_head=4, n_embd=128, qk_norm=True)
vision = dict(n_layer=2, n_head=4, n_embd=128, patch_size=8)
