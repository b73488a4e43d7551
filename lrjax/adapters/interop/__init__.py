"""Files of other libraries, each format known in one place alone."""

from .gguf import read_gguf as read_gguf
from .gguf_lora import load_gguf_lora as load_gguf_lora, save_gguf_lora as save_gguf_lora
from .kohya import load_kohya as load_kohya, save_kohya as save_kohya
from .peft import load_peft as load_peft, save_peft as save_peft
