# GPT-2 124M on OpenWebText with AdamCPR, Kappa-IP: the norm of each weight matrix becomes its bound
# when the norm's growth slows down; nothing to tune. 491,520 tokens an iteration, one GPU of 80 GB.
# Length and warm-up are those of the CPR paper (arXiv 2311.09058): 200k steps, 5,000 of warm-up
# (Figure 3). It reports perplexity 17.96, and for AdamW 18.23 after 200k steps and 18.04 after
# 300k (Figure 1), with other settings than these: docs/papers.md has the commands. AdamW with this
# schedule is config/train_gpt2_adamw.py with --warmup_iters=5000 --max_iters=200000
# --lr_decay_iters=200000.
#
#     python train.py config/train_gpt2_cpr.py
out_dir = 'out-gpt2-cpr'
wandb_run_name = 'gpt2-124M-cpr'
optimizer = 'adamcpr'
kappa_init_method = 'inflection_point'

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
