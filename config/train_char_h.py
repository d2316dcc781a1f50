# A small GPT on the characters of Python's standard library, with AdamH.
# It holds the norm of each weight matrix. At the peak of the schedule a step's length is
# adamh_step_scale * learning_rate = 1.4 % of that norm. The validation loss at the end was 1.1887,
# 1.1799, 1.1888 and 1.2519 with a scale of 2.5, 3.5, 5 and 10, and 1.1855 in
# config/train_char_adamw.py (one seed, one thread, 2026-11-25).
#
#     python data/pystdlib_char/prepare.py
#     python train.py config/train_char_h.py
out_dir = 'out-char-h'
wandb_project = 'char'
wandb_run_name = 'char-h'
optimizer = 'adamh'
adamh_step_scale = 3.5

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
