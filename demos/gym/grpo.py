# reasoning-gym's own score as the reward, from the warm model
data_dir = "out/gym_demo/prompts"
out_dir = "out/gym_demo/grpo"
init_from = "out/gym_demo/sft"
reward = ["extras/gym.py:reward"]
num_steps = 300
batch_size = 16  # prompts per step
num_samples = 16
seq_len = 128
max_new_tokens = 16
lr = 3e-4
warmup_steps = 10
log_every = 20
eval_every = 100
eval_seqs = 200
save_every = 100
