# lines to order, from the demo's pretrained model, a minute or two on two CPU cores
data_dir = "out/demo/chat"
out_dir = "out/demo/sft"
init_from = "out/demo/pretrain"
num_steps = 140
batch_size = 16                        # rows per step, about four conversations each
seq_len = 128
lr = 2e-3
warmup_steps = 20
log_every = 25
eval_every = 70
save_every = 70
eval_prompts = ["A line from T, 7 words, ending in .", "5 words. First letter W, last mark ?"]
