"""An etcd v3 client for trio: gRPC over h2, with no dependency on the rest of kilo-etcd.

    from kilo_etcd.etcd.api import Config
    from kilo_etcd.etcd.client import open_client

    async with open_client(Config(endpoints=("10.0.0.1:2379", "10.0.0.2:2379"))) as etcd:
        await etcd.put("/greeting", "hello")
        async with etcd.watch_prefix("/") as watch:
            async for batch in watch:
                ...

The values, errors and protocols are in `api`; what else is here may change.
"""
