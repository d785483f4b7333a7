# lines to order: real lines against near misses, from the demo's SFT model, about a minute on two
# CPU cores
data_dir = "out/demo/pairs"
out_dir = "out/demo/dpo"
init_from = "out/demo/sft"
num_steps = 60
batch_size = 32  # pairs per step
seq_len = 128
lr = 5e-4
warmup_steps = 10
nll_coef = 1.0  # without it both answers become less likely, samples worse
log_every = 20
eval_every = 30
save_every = 30
eval_prompts = ["A line from T, 7 words, ending in .", "5 words. First letter W, last mark ?"]
