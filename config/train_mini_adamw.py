# The smallest GPT of results/equilibrium, with AdamW: 28,000 parameters, 250 characters of Python's
# standard library for each of them, one minute on a CPU core. Weight decay has the time here to
# balance what the steps add to the norms. The other config/train_mini_*.py differ only in the rule.
#
#     python data/pystdlib_char/prepare.py
#     python train.py config/train_mini_adamw.py
out_dir = 'out-mini-adamw'
wandb_project = 'mini'
wandb_run_name = 'mini-adamw'
optimizer = 'adamw'
weight_decay = 0.1

dataset = 'pystdlib_char'
batch_size = 64
block_size = 64
gradient_accumulation_steps = 1

n_layer = 2
n_head = 2
n_embd = 32

learning_rate = 4e-3
min_lr = 4e-4
warmup_iters = 100
max_iters = 1750
lr_decay_iters = max_iters
beta2 = 0.99  # few tokens an iteration: average the squares over more of them

eval_interval = 350
eval_iters = 40
log_interval = 25
norm_log_interval = 25
keep_checkpoints = 1
compile = False  # takes longer than it saves here
