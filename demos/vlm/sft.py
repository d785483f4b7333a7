# Questions about pictures, from random weights; see run.py.
data_dir, out_dir = "out/vlm_demo/sees/set", "out/vlm_demo/sees/run"
batch_size, seq_len = 4, 512              # rows of seventeen questions or so, each with its picture
num_steps, num_epochs = 1500, 0
optimizer = "muon"
lr, warmup_steps, weight_decay = 2e-3, 40, 0.05
eval_every, eval_seqs, save_every, log_every = 150, 60, 300, 25
model = dict(n_layer=2, n_head=4, n_embd=128, qk_norm=True)
vision = dict(n_layer=2, n_head=4, n_embd=128, patch_size=8)
