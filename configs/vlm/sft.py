# Questions about pictures, from random weights; see run.py.
data_dir, out_dir = "out/vlm_demo/sees/set", "out/vlm_demo/sees/run"
batch_size, seq_len = 24, 512             # rows of three conversations or so
num_steps, num_epochs = 400, 0
lr, warmup_steps, weight_decay = 1e-3, 40, 0.05
eval_every, eval_seqs, save_every, log_every = 100, 60, 200, 10
model = dict(n_layer=4, n_head=4, n_embd=128, qk_norm=True)
vision = dict(n_layer=4, n_head=4, n_embd=128, patch_size=8)
