"""The policy under training: how it is loaded, sampled, identified and copied to workers."""

from cropi.policy.loaded_policy import Policy as Policy
from cropi.policy.loaded_policy import PolicyCopy as PolicyCopy
from cropi.policy.loaded_policy import Replica as Replica
from cropi.policy.loaded_policy import fingerprint as fingerprint
from cropi.policy.loaded_policy import load_policy as load_policy
from cropi.policy.loaded_policy import load_tokenizer as load_tokenizer
from cropi.policy.loaded_policy import policy_location as policy_location
from cropi.policy.loaded_policy import weights_identity as weights_identity
from cropi.policy.passes import completion_logprobs as completion_logprobs
from cropi.policy.passes import evaluating as evaluating
from cropi.policy.passes import is_out_of_memory as is_out_of_memory
from cropi.policy.passes import longest_alike as longest_alike
from cropi.policy.passes import mean_hidden_states as mean_hidden_states
from cropi.policy.passes import shared_prefixes as shared_prefixes
