package org.tfgptopt.chat

import com.google.ai.edge.litertlm.Backend
import com.google.ai.edge.litertlm.Conversation
import com.google.ai.edge.litertlm.Engine
import com.google.ai.edge.litertlm.EngineConfig
import java.io.File
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.map
import kotlinx.coroutines.withContext

/** A bundle of tfgptopt, and one conversation with it. */
class Answerer private constructor(
    private val engine: Engine,
    private val conversation: Conversation,
) : AutoCloseable {

    /** What the model answers, piece by piece; earlier turns are remembered. */
    fun answer(message: String): Flow<String> =
        conversation.sendMessageAsync(message).map { it.toString() }

    override fun close() {
        conversation.close()
        engine.close()
    }

    companion object {
        /** Opens a bundle. Takes seconds, so it leaves the main thread. */
        suspend fun open(bundle: File, cache: File): Answerer = withContext(Dispatchers.IO) {
            require(bundle.canRead()) { "There is no bundle at $bundle: push one with adb." }
            // The bundle says that it is for the CPU; packed weights go into the app's cache.
            val config = EngineConfig(
                modelPath = bundle.path,
                backend = Backend.CPU(),
                cacheDir = cache.path,
            )
            val engine = Engine(config)
            engine.initialize()
            Answerer(engine, engine.createConversation())
        }
    }
}
