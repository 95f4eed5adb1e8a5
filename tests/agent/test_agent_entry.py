"""What the agent's process does not load."""

from __future__ import annotations

import json
import subprocess
import sys


def test_the_agent_loads_nothing_that_it_does_not_use() -> None:
    program = (
        "import json, sys\n"
        "from kilo_etcd.agent.entry import main\n"
        "sys.argv = ['kg', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "import kilo_etcd.agent.daemon\n"
        "from kilo_etcd.etcd.pb import etcd_pb2\n"
        "assert str(etcd_pb2.PutRequest(lease=7)).split() == ['lease:', '7']\n"
        "heavy = ('rich', 'asyncio', 'multiprocessing', 'pyroute2', 'wsgiref', 'email', 'http.', 'urllib.request',\n"
        "    'google.protobuf.internal.python_message')\n"
        "loaded = [name for name in sys.modules if name.startswith(heavy)]\n"
        "real = [name for name in loaded if getattr(sys.modules[name], '__spec__', None) is not None]\n"
        "print(json.dumps(real), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr) == []
