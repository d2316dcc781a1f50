# A small GPT on the characters of Python's standard library, with AdamCPR, Kappa-IP.
# The norm of each weight matrix becomes its bound when the norm's growth slows down.
# `make train` runs this: 3 minutes on 2 CPU cores.
#
#     python data/pystdlib_char/prepare.py
#     python train.py config/train_char_cpr.py
out_dir = 'out-char-cpr'
wandb_project = 'char'
wandb_run_name = 'char-cpr'
optimizer = 'adamcpr'
kappa_init_method = 'inflection_point'
reg_step_size = 25  # the run is short: look at the growth more often than every 200 steps

dataset = 'pystdlib_char'
batch_size = 32
block_size = 128
gradient_accumulation_steps = 1

n_layer = 4
n_head = 4
n_embd = 128
init_std = 0.06  # GPT-2's 0.02 suits a width of 768; a narrow model needs more

learning_rate = 4e-3  # a small model can take a high one
min_lr = 4e-4
warmup_iters = 100
max_iters = 1000
lr_decay_iters = max_iters
beta2 = 0.99  # few tokens an iteration: average the squares over more of them

eval_interval = 200
eval_iters = 40
log_interval = 25
norm_log_interval = 25
compile = False  # takes longer than it saves here
