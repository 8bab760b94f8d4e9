"""All differences between the supported jax versions (0.10 to 0.12).

Imports only jax. Callers write `_compat.name`, which shows where versions differ.

Imports nothing of txcore.
"""

from txcore._compat.compiling import array_type as array_type
from txcore._compat.compiling import compilation_seams as compilation_seams
from txcore._compat.compiling import compiling_watched as compiling_watched
from txcore._compat.compiling import direct_call as direct_call
from txcore._compat.compiling import executable_shardings as executable_shardings
from txcore._compat.compiling import lowered_devices as lowered_devices
from txcore._compat.compiling import lowered_name as lowered_name
from txcore._compat.compiling import lowered_options as lowered_options
from txcore._compat.compiling import marks_partitioner as marks_partitioner
from txcore._compat.compiling import mesh_device as mesh_device
from txcore._compat.compiling import no_persistent_cache as no_persistent_cache
from txcore._compat.compiling import tell_of_unwatched as tell_of_unwatched
from txcore._compat.compiling import use_persistent_cache as use_persistent_cache
from txcore._compat.jaxprs import called_from as called_from
from txcore._compat.jaxprs import current_traceback as current_traceback
from txcore._compat.jaxprs import eqn_collective as eqn_collective
from txcore._compat.jaxprs import eqn_frames as eqn_frames
from txcore._compat.jaxprs import eqn_name_stack as eqn_name_stack
from txcore._compat.jaxprs import live_jaxpr as live_jaxpr
from txcore._compat.jaxprs import plain_jaxpr as plain_jaxpr
from txcore._compat.jaxprs import scan_counts as scan_counts
from txcore._compat.jaxprs import spec_entries as spec_entries
from txcore._compat.pallas import copied_array as copied_array
from txcore._compat.pallas import gpu_grid as gpu_grid
from txcore._compat.pallas import is_of_gpu as is_of_gpu
from txcore._compat.pallas import is_simulated as is_simulated
from txcore._compat.pallas import kernel_grid as kernel_grid
from txcore._compat.pallas import kernel_metadata as kernel_metadata
from txcore._compat.pallas import kernel_name as kernel_name
from txcore._compat.pallas import multimem_kernels as multimem_kernels
from txcore._compat.pallas import reads_peer as reads_peer
from txcore._compat.pallas import remote_device as remote_device
from txcore._compat.pallas import simulates_tpu as simulates_tpu
from txcore._compat.processes import coordination_client as coordination_client
from txcore._compat.processes import coordination_rank as coordination_rank
from txcore._compat.processes import coordination_size as coordination_size
from txcore._compat.processes import coordinator_address as coordinator_address
from txcore._compat.processes import detect_cluster as detect_cluster
from txcore._compat.processes import listen_with_gloo_at as listen_with_gloo_at
from txcore._compat.processes import on_tpu_vm as on_tpu_vm
from txcore._compat.profiles import live_programs as live_programs
from txcore._compat.profiles import profile_options as profile_options
from txcore._compat.profiles import read_profile as read_profile
from txcore._compat.settings import backend_started as backend_started
from txcore._compat.settings import combiner_key as combiner_key
from txcore._compat.settings import is_key_array as is_key_array
from txcore._compat.settings import keeps_barriers as keeps_barriers
from txcore._compat.settings import key_impl as key_impl
from txcore._compat.settings import may_trace as may_trace
from txcore._compat.settings import program_settings as program_settings
from txcore._compat.settings import set_if_there as set_if_there
from txcore._compat.settings import setting as setting
from txcore._compat.settings import simulate_cpu_devices as simulate_cpu_devices
from txcore._compat.settings import thread_settings as thread_settings
from txcore._compat.varying import all_gather_invariant as all_gather_invariant
from txcore._compat.varying import axis_size as axis_size
from txcore._compat.varying import bound_axes as bound_axes
from txcore._compat.varying import cast_to_unreduced as cast_to_unreduced
from txcore._compat.varying import cast_to_varying as cast_to_varying
from txcore._compat.varying import equal_reduced_axes as equal_reduced_axes
from txcore._compat.varying import is_vmapped as is_vmapped
from txcore._compat.varying import shape_like as shape_like
from txcore._compat.varying import tracks_varying as tracks_varying
from txcore._compat.varying import unreduced_axes as unreduced_axes
from txcore._compat.varying import unreduced_kind as unreduced_kind
from txcore._compat.varying import varying_axes as varying_axes
from txcore._compat.varying import varying_axes_of as varying_axes_of
