# The smallest GPT of results/equilibrium, with AdamW: 28,000 parameters, 257 characters of Python's
# standard library for each of them, one or two minutes on a CPU core. With so large a batch and so
# high a learning rate, weight decay balances within the run what the steps add to the norms. The
# other config/train_mini_*.py differ only in the rule.
#
#     python data/pystdlib_char/prepare.py
#     python train.py config/train_mini_adamw.py
out_dir = 'out-mini-adamw'
wandb_project = 'mini'
wandb_run_name = 'mini-adamw'
optimizer = 'adamw'
weight_decay = 0.3

dataset = 'pystdlib_char'
batch_size = 256
block_size = 64
gradient_accumulation_steps = 1

n_layer = 2
n_head = 2
n_embd = 32
init_std = 0.1  # GPT-2's 0.02, scaled by sqrt(768 / n_embd)

learning_rate = 3e-2
min_lr = 3e-3
warmup_iters = 25
max_iters = 437
lr_decay_iters = max_iters
beta2 = 0.99

eval_interval = 50
eval_iters = 40
log_interval = 5
norm_log_interval = 5
keep_checkpoints = 1
compile = False  # takes longer than it saves here
