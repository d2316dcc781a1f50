# GPT-2 124M on OpenWebText with AdamW, the baseline of the papers and of nanoGPT.
# 491,520 tokens an iteration. The AdamWN paper (arXiv 2311.11446) reports a validation loss of
# 2.902 after 100k iterations with weight decay 0.1.
# One GPU of 80 GB. With less memory, lower batch_size and raise gradient_accumulation_steps by the
# same factor.
#
#     python train.py config/train_gpt2_adamw.py
out_dir = 'out-gpt2-adamw'
wandb_run_name = 'gpt2-124M-adamw'
optimizer = 'adamw'
weight_decay = 0.1

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 2000
max_iters = 100000
lr_decay_iters = max_iters

eval_interval = 1000
eval_iters = 200
log_interval = 10
