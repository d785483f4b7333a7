# lines to order: rewarded for letter, words and mark of a line that is verse, from the demo's DPO
# model
data_dir = "out/demo/prompts"
out_dir = "out/demo/grpo"
init_from = "out/demo/dpo"
reward = ["data/lines.py:reward"]
num_steps = 40
batch_size = 24  # prompts per step
num_samples = 8  # answers to each
seq_len = 128
max_new_tokens = 40
lr = 5e-4
beta = 0.02  # holds the policy near verse
warmup_steps = 5
log_every = 10
eval_every = 20
eval_seqs = 100
save_every = 20
eval_prompts = ["A line from T, 7 words, ending in .", "5 words. First letter W, last mark ?"]
