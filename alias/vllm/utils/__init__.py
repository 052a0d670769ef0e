from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.counter import Counter
from vllm.utils.network_utils import get_ip, get_open_port
from vllm.utils.system_utils import random_uuid

__all__ = ["Counter", "FlexibleArgumentParser", "get_ip", "get_open_port", "random_uuid"]
