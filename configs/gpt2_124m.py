# GPT-2's size (12 layers, 12 heads, 768 channels) in Llama form, about half a million tokens a step
data_dir = "out/text_gpt2"             # python data/prepare.py text --tokenizer=gpt2 ...
out_dir = "out/gpt2_124m"
num_steps = 20_000
batch_size = 512                       # sequences per step
micro_batch_size = 16
seq_len = 1024
lr = 6e-4
warmup_steps = 700
save_every = 1000
compile = True
model = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50_304)   # padded to a multiple of 64
