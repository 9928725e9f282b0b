"""Usage examples of model cards, by the inputs that a model takes."""

TEXT_SNIPPET = """\
import hf_adaptive_sparse  # first: it teaches transformers to read this checkpoint
from transformers import {text_class}, AutoTokenizer

repo = {repo}
tokenizer = AutoTokenizer.from_pretrained(repo)
model = {text_class}.from_pretrained(repo, dtype="auto")

inputs = tokenizer({prompt}, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""

IMAGE_SNIPPET = """\
import hf_adaptive_sparse as has  # first: it teaches transformers to read this checkpoint
from PIL import Image
from transformers import AutoProcessor

repo = {repo}
processor = AutoProcessor.from_pretrained(repo)
model = has.AutoModelForVision2Seq.from_pretrained(repo, dtype="auto")

image = Image.open("picture.png").convert("RGB")
inputs = processor(images=image, text={prompt}, return_tensors="pt").to(dtype=model.dtype)
output = model.generate(**inputs, max_new_tokens=32)
print(processor.batch_decode(output, skip_special_tokens=True)[0])
"""

SOUND_SNIPPET = """\
import hf_adaptive_sparse  # first: it teaches transformers to read this checkpoint
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.audio_utils import load_audio

repo = {repo}
processor = AutoProcessor.from_pretrained(repo)
model = AutoModelForMultimodalLM.from_pretrained(repo, dtype="auto")

sound = load_audio("sound.wav", sampling_rate=16000)
inputs = processor(audio=sound, text={prompt}, return_tensors="pt").to(dtype=model.dtype)
output = model.generate(**inputs, max_new_tokens=32)
print(processor.batch_decode(output, skip_special_tokens=True)[0])
"""
