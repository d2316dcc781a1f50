# GPT-2 124M on OpenWebText with AdamCPR, Kappa-WS, otherwise as config/train_gpt2_cpr.py.
# The norm of each weight matrix after twice the learning rate's warm-up becomes its bound.
# The CPR paper (arXiv 2311.09058, Figure 3) compares 1, 2 and 4 times the warm-up of 5,000 steps.
# 491,520 tokens an iteration. One GPU of 80 GB.
#
#     python train.py config/train_gpt2_cpr_ws.py
out_dir = 'out-gpt2-cpr-ws'
wandb_run_name = 'gpt2-124M-cpr-ws'
optimizer = 'adamcpr'
kappa_init_method = 'warm_start'

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 5000
max_iters = 200000
lr_decay_iters = max_iters
kappa_init_param = 2.0 * warmup_iters

eval_interval = 1000
eval_iters = 200
log_interval = 10
