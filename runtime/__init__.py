"""Everything that runs on a tier. The walk of one frame, module by module (docs/walk.md has the function names):

1. `camera` (and `camera_opencv`, `camera_replay`) yields a Frame; `capture` holds the latest one.
2. `device` takes it; `preprocess` makes it the Features at cut 0.
3. `cascade` runs the next `segment`, asks its exit head, and `policy` says whether that answer may stand.
4. What is unfinished goes up: `uplink` has it encoded (`coding`: by a `codec`, against one of the `references` where
   that is possible), packs it (`packet`) and publishes it (`topics`, `link`).
5. `node` receives it; `batcher` gathers company; `cascade` goes on from that cut; an edge node's `uplink` escalates.
6. The `reply` comes down the same way, and `device` publishes the Result.

`config` and `manifest` say who runs what, `counters` where every frame went, `errors` what can go wrong. `cli` is the
command; `sim` and `demo` run all tiers on one machine.
"""
