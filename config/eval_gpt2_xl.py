# The loss of OpenAI's gpt2-xl (1.56B parameters) on the validation split of OpenWebText.
#
#     python train.py config/eval_gpt2_xl.py
init_from = 'gpt2-xl'
eval_only = True
eval_iters = 500
batch_size = 8
