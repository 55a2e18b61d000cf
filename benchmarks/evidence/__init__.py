"""Does sparse fine-tuning train a real language model as well as dense LoRA does?"""
