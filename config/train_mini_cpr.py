# The smallest GPT of results/equilibrium, with AdamCPR and Kappa-IP, which looks at the growth of
# the norms every fiftieth of the run.
#
#     python data/pystdlib_char/prepare.py
#     python train.py config/train_mini_cpr.py
out_dir = 'out-mini-cpr'
wandb_project = 'mini'
wandb_run_name = 'mini-cpr'
optimizer = 'adamcpr'
kappa_init_method = 'inflection_point'
reg_step_size = 9

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
