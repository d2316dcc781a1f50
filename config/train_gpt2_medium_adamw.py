# GPT-2 medium, 354M, on OpenWebText with AdamW: the baseline of config/train_gpt2_medium_cpr.py.
# 491,520 tokens an iteration. One GPU of 80 GB.
#
#     python train.py config/train_gpt2_medium_adamw.py
out_dir = 'out-gpt2-medium-adamw'
wandb_run_name = 'gpt2-354M-adamw'
optimizer = 'adamw'
weight_decay = 0.1

n_layer = 24
n_head = 16
n_embd = 1024

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 5000
max_iters = 200000
lr_decay_iters = max_iters

eval_interval = 1000
eval_iters = 200
log_interval = 10
