# GPT-2 124M on OpenWebText with AdamWN.
# It steers the norm of each weight matrix to twice the norm at the start. The AdamWN paper (arXiv
# 2311.11446) reports a validation loss of 2.884 after 100k iterations, and of 2.902 with AdamW and
# weight decay 0.1. 491,520 tokens an iteration. One GPU of 80 GB.
#
#     python train.py config/train_gpt2_wn.py
out_dir = 'out-gpt2-wn'
wandb_run_name = 'gpt2-124M-wn'
optimizer = 'adamwn'
wn_ratio = 2.0
wn_rate = 1e-2
wn_ramp_iters = 2500

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
