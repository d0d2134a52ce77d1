# DPO of SmolLM2-135M-Instruct on UltraFeedback, on one consumer GPU of 8 to 24 GB, or a patient CPU (with --dtype=float32
# --max_tokens=1024). Not a paper's experiment; no result is claimed. make real is a short version of it.
#     python dpo.py config/dpo_smollm2.py
model = 'HuggingFaceTB/SmolLM2-135M-Instruct'  # or the folder that make real leaves: out/real/SmolLM2-135M-Instruct
data = 'ultrafeedback'
chat = True
dtype = 'bfloat16'
loss = 'dpo'
beta = 0.1
batch_size = 32
max_length = 1024
max_prompt_length = 512
max_tokens = 2048  # leaves room on 8 GB
lr = 5e-6  # ten times the rate for billions of weights
lr_schedule = 'linear'
warmup_steps = 50
eval_every = 9984
out_dir = 'out/dpo_smollm2'
