# The loss of OpenAI's gpt2-large (774M parameters) on the validation split of OpenWebText.
#
#     python train.py config/eval_gpt2_large.py
init_from = 'gpt2-large'
eval_only = True
eval_iters = 500
batch_size = 8
