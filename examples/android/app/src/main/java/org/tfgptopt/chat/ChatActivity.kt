package org.tfgptopt.chat

import android.os.Bundle
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import androidx.activity.ComponentActivity
import androidx.lifecycle.lifecycleScope
import java.io.File
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

private const val PUSHED = "/data/local/tmp/gpt.litertlm"

class ChatActivity : ComponentActivity() {
    private var answerer: Answerer? = null
    private lateinit var text: TextView
    private lateinit var ask: Button

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        text = TextView(this).apply { setPadding(32, 32, 32, 32); setTextIsSelectable(true) }
        val message = EditText(this).apply { setHint(R.string.message) }
        ask = Button(this).apply { setText(R.string.ask); isEnabled = false }
        val scroll = ScrollView(this).apply { addView(text) }
        setContentView(LinearLayout(this).apply {
            orientation = LinearLayout.VERTICAL
            fitsSystemWindows = true
            addView(scroll, LinearLayout.LayoutParams(-1, 0, 1f))
            addView(message)
            addView(ask)
        })
        ask.setOnClickListener {
            val question = message.text.toString().trim()
            if (question.isNotEmpty()) { message.text.clear(); show(question) }
        }
        text.setText(R.string.loading)
        lifecycleScope.launch {
            text.text = try {
                answerer = Answerer.open(copied(), cacheDir)
                ask.isEnabled = true
                ""
            } catch (error: Exception) { error.message }
        }
    }

    /** The bundle in the app's own folder, where the engine may write beside it. */
    private suspend fun copied(): File = withContext(Dispatchers.IO) {
        val own = File(filesDir, "gpt.litertlm")
        val pushed = File(PUSHED)
        if (pushed.canRead() && pushed.lastModified() > own.lastModified()) {
            val part = File(filesDir, "gpt.part")
            pushed.copyTo(part, overwrite = true)
            part.renameTo(own)
        }
        own
    }

    private fun show(question: String) = lifecycleScope.launch {
        ask.isEnabled = false
        text.append("\n> $question\n")
        try {
            answerer?.answer(question)?.collect { text.append(it) }
        } catch (error: Exception) { text.append(error.message) }
        text.append("\n")
        ask.isEnabled = true
    }

    override fun onDestroy() {
        answerer?.close()
        super.onDestroy()
    }
}
