# The loss of OpenAI's gpt2 (124M parameters) on the validation split of OpenWebText.
#
#     python train.py config/eval_gpt2.py
init_from = 'gpt2'
eval_only = True
eval_iters = 500
batch_size = 8
