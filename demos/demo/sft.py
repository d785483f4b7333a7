# lines to order, from the demo's pretrained model, two minutes on two CPU cores
data_dir = "out/demo/chat"
out_dir = "out/demo/sft"
init_from = "out/demo/pretrain"
num_steps = 380
batch_size = 8  # rows per step, about four conversations each
seq_len = 128
lr = 2e-3
warmup_steps = 40
log_every = 20
eval_every = 190
save_every = 190
eval_prompts = ["A line from T, 7 words, ending in .", "5 words. First letter W, last mark ?"]
