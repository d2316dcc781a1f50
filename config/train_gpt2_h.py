# GPT-2 124M on OpenWebText with AdamH.
# It holds the norm of each weight matrix and moves it by 1.8 % of that norm at the peak of the
# schedule, with betas 0.9 and 0.95: the settings with which AdamH took 4,875 steps to a validation
# loss of 3.28 on FineWeb (modded-nanogpt, pull request 272). That run had no tied embeddings, other
# learning rates for embeddings and vectors (here AdamW's), larger initial weights, normalized
# queries and keys, and a linear schedule. 491,520 tokens an iteration. One GPU of 80 GB.
#
#     python train.py config/train_gpt2_h.py
out_dir = 'out-gpt2-h'
wandb_run_name = 'gpt2-124M-h'
optimizer = 'adamh'
adamh_step_scale = 18.0
beta1 = 0.9
beta2 = 0.95

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
